"""Using a trained model: flow of images, and what to look at."""
