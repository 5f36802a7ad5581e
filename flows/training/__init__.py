"""Training of the regional encoder: data, networks in training, losses and the loop (the flow itself is `flows/train_rgi.py`)."""
