"""The Python API: KVCacheEngine, its statistics and PerformanceAnalyzer."""
