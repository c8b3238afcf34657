"""Networks as data: architectures that rebuild from JSON, their layers, costs and export."""
