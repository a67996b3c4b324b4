"""Helpers of studies: arms of a comparison, and tests of their differences."""
