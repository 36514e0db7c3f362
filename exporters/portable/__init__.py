"""What lets others than Python use a bundle's graphs."""
