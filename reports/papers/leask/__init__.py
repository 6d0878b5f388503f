"""Leask et al. 2025, and Bussmann et al. 2024, whose BatchTopK experiments its appendix contains."""
