"""More features in every layer of a converted network."""
