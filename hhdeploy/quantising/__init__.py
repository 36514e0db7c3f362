"""From a float32 bundle and images to a judged Q/DQ graph in it."""
