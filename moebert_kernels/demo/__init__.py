"""The whole way on a real model and real data: `moebert demo`."""
