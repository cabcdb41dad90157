"""What a quantised matrix becomes: schemes, which targets, the arithmetic and its way back."""
