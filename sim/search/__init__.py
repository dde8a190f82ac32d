"""The search for scenarios that break a core: drawn at random, explored exhaustively, shrunk to the smallest.

swarm --Scenario--> probe --Finding--> concrete --> shrink --> failure.yaml --> kvproof replay
"""
