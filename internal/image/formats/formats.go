// Package formats lists the formats of disk images that Holdfast reads.
package formats

import (
	"holdfast/internal/image"
	"holdfast/internal/image/qcow2"
	"holdfast/internal/image/vhd"
	"holdfast/internal/image/vhdx"
	"holdfast/internal/image/vmdk"
)

// All formats.
func All() image.Formats {
	return image.Formats{vhd.Format(), vhdx.Format(), vmdk.Format(), qcow2.Format()}
}
