"""The modules and functions a converted network is made of."""
