"""What torch has no fast form for: attention over live rows, products with packed weights."""
