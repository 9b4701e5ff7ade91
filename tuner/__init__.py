"""Find, train and export the variational autoencoder that draws the best digits."""

__version__ = "0.1.0"
