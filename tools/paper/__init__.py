"""The paper's tables: their runs, and the code that trains, measures and collects them."""
