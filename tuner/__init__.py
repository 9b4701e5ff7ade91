"""Find, train and export the variational autoencoder that draws your images best."""

__version__ = "0.1.0"
