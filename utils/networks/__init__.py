"""Networks: those of papers for small images, torchvision's, and anti-aliased downsampling."""
