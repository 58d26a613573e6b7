"""The place for hooks of federated learning. There are none yet: nothing in octoc looks here."""
