"""The commands of utils/analyze.py, a file each: words, arguments, and from sources to rows."""
