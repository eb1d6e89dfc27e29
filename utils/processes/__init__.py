"""This process among others: its rank, its cores, the signals that stop it. Imports no torch."""
