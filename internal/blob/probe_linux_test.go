package blob

import (
	"errors"
	"strings"
	"testing"
)

func TestPretending(t *testing.T) {
	const mounts = `22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
31 22 0:40 / /mnt/smb\040share rw,relatime - cifs //nas/backup rw,vers=3.1.1,nostrictsync,cache=strict
32 22 0:41 / /mnt/smb rw,relatime - cifs //nas/backup rw,vers=3.1.1,cache=strict
33 22 8:1 / /srv rw,noatime - ext4 /dev/sda1 rw,nobarrier
34 33 8:2 / /srv/good rw - ext4 /dev/sdb1 rw
35 22 0:50 / /over rw - overlay overlay rw,lowerdir=/a,upperdir=/b,workdir=/c,volatile
`
	for dir, want := range map[string]string{
		"/backup": "", "/mnt/smb share/x": "nostrictsync", "/mnt/smb/x": "", "/mnt/smb": "", "/srv": "nobarrier",
		"/srv/goodly": "nobarrier", "/srv/good/x": "", "/over/x": "volatile",
	} {
		err := pretendedBy(mounts, dir)
		if want == "" && err != nil || want != "" && (!errors.Is(err, ErrUnfit) || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", dir, err, want)
		}
	}
}
