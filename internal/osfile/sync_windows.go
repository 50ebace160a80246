package osfile

// SyncDir makes names created, renamed or removed in the directory durable.
// It does nothing on Windows, where NTFS journals them by itself and a
// directory cannot be opened for it.
func SyncDir(string) error { return nil }
