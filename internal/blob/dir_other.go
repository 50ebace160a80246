//go:build !linux

package blob

func (osFiles) nameless(string) (newFile, error) { return nil, errNameless }
