"""What make calls: the test cluster, the container images, generated files."""
