"""Networks: those of the papers for small images, torchvision's, and blur before striding."""
