package lab

import "errors"

// lock is refused: libvirt does not run guests on Windows.
func lock(path string) (unlock func(), err error) {
	return nil, errors.New("the lab needs Linux")
}

func tryLock(path string) (unlock func(), err error) { return lock(path) }
