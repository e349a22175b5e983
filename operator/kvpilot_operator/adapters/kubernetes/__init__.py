"""The cluster port, over the API server."""
