//go:build !linux

package blob

// create makes path with data, durable but for its directory entry; it fails
// with fs.ErrExist when path exists.
func create(path string, data []byte) error { return createNamed(path, data) }
