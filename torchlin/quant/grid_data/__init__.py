"""Grids that come with the library, a text file each (torchlin/quant/grids.py reads them); make.py makes them."""
