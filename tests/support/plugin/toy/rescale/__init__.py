"""A stage that scales cut linears to the energy of their dense outputs."""
