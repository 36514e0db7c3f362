"""The same service in replicas of Ray Serve."""
