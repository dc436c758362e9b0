"""What the product adds to a request beside what its peers add, each in an environment of its own."""
