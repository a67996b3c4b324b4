"""Hooks into other packages, one module each. Importing one imports the package that it is for."""
