"""The metrics port, over Prometheus or by scraping the replicas."""
