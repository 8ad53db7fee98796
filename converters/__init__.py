if __name__ != "mswift.converters":
    raise ImportError("import this package as mswift.converters, never as converters (the folder is reached by a link)")
