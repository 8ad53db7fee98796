if __name__ != "mswift.parallel":
    raise ImportError("import this package as mswift.parallel, never as parallel (the folder is reached by a link)")
