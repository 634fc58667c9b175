"""Operations with a plain reference and a faster twin: one package each, chosen between in ``dispatch`` alone."""
