"""Generate the CustomResourceDefinitions and the reference pages from the models."""
