"""The product on one machine: the same core, with processes, files and scraping in place of a cluster."""
