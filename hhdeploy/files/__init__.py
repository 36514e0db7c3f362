"""What reaches the disk: files and directories that appear whole, scratch, tensors, caches."""
