//go:build !linux

package blob

import "errors"

// create makes path with data, durable but for its directory entry; it fails
// with fs.ErrExist when path exists.
func create(path string, data []byte) error { return createNamed(path, data) }

func linked(string) bool { return false }

func noLinks(error) bool { return false }

func renameNew(string, string) error { return errors.ErrUnsupported }

// immutable would read the immutable attribute, which cannot be seen from here.
func immutable(string) (set, known bool) { return false, false }
