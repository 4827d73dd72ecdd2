"""From images and texts to texts and images: the pipeline and its compiled programs."""
