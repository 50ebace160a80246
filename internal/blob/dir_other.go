//go:build !linux

package blob

import "errors"

func (osFiles) nameless(string) (newFile, error) { return nil, errNameless }

func linked(string) bool { return false }

func noLinks(error) bool { return false }

func renameNew(string, string) error { return errors.ErrUnsupported }

// immutable would read the immutable attribute, which cannot be seen from here.
func immutable(string) (set, known bool) { return false, false }
