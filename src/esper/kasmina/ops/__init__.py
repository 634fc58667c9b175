"""Operations with a plain reference and, where it pays, a faster twin."""
