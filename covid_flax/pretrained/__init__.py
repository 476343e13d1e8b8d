"""ImageNet weights: names, reading, strict loading, download."""
