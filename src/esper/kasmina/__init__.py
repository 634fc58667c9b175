"""The execution layer: sites, chunks, seeds, their lifecycle, and the branches that are grafted on."""
