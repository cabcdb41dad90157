"""What a quantised matrix becomes, and its place on the road."""
