"""The paper's tables: their runs, and what trains, measures and collects them."""
