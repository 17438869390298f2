"""Scripts that make data sets. This file lets them win over an installed package named `data`."""
