"""Programs behind the Makefile: test cluster, container images, generated files, test runs."""
