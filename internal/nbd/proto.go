package nbd

import "encoding/binary"

// Magic numbers (proto, "Newstyle negotiation", "Fixed newstyle negotiation",
// "Transmission").
const (
	magicInit       = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454f5054 // "IHAVEOPT"
	magicOptReply   = 0x0003e889045565a9
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef
)

// Handshake and client flags (proto, "Handshake flags", "Client flags"): the
// same bits from either side.
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
)

// Transmission flags (proto, "Transmission flags").
const (
	flagHasFlags        = 1 << 0
	flagReadOnly        = 1 << 1
	flagSendFlush       = 1 << 2
	flagSendFUA         = 1 << 3
	flagSendTrim        = 1 << 5
	flagSendWriteZeroes = 1 << 6
	flagSendDF          = 1 << 7
	flagCanMultiConn    = 1 << 8
	flagSendCache       = 1 << 10
	flagSendFastZero    = 1 << 11
)

// Options (proto, "Option types").
const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optStartTLS        = 5
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMeta        = 9
	optSetMeta         = 10
)

// Option replies (proto, "Option reply types").
const (
	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4

	repError           = 1 << 31
	repErrUnsup        = repError + 1
	repErrPolicy       = repError + 2
	repErrInvalid      = repError + 3
	repErrPlatform     = repError + 4
	repErrTLSReqd      = repError + 5
	repErrUnknown      = repError + 6
	repErrShutdown     = repError + 7
	repErrBlockSizeReq = repError + 8
	repErrTooBig       = repError + 9
)

// Information types (proto, NBD_REP_INFO).
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Commands and their flags (proto, "Request types", "Command flags").
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6
	cmdBlockStatus = 7

	cmdFlagFUA      = 1 << 0
	cmdFlagNoHole   = 1 << 1
	cmdFlagDF       = 1 << 2
	cmdFlagReqOne   = 1 << 3
	cmdFlagFastZero = 1 << 4
)

// Structured replies (proto, "Structured reply types").
const (
	replyFlagDone = 1 << 0

	replyNone        = 0
	replyData        = 1
	replyHole        = 2
	replyBlockStatus = 5
	replyIsError     = 1 << 15
	replyError       = replyIsError + 1
	replyErrorOffset = replyIsError + 2
)

// Flags of the metadata context "base:allocation" (proto, "base:allocation
// metadata context") and of QEMU's "qemu:dirty-bitmap:NAME" (QEMU,
// docs/interop/nbd.txt).
const (
	StateHole  = 1 << 0 // base:allocation: not allocated
	StateZero  = 1 << 1 // base:allocation: reads as zeros
	StateDirty = 1 << 0 // qemu:dirty-bitmap: changed
)

// BaseAllocation is the metadata context that tells holes and zeros.
const BaseAllocation = "base:allocation"

// Sizes in bytes.
const (
	requestLen    = 28 // magic 4, flags 2, type 2, cookie 8, offset 8, length 4
	simpleLen     = 16 // magic 4, error 4, cookie 8
	chunkLen      = 20 // magic 4, flags 2, type 2, cookie 8, length 4
	optionLen     = 16 // magic 8, option 4, length 4
	optReplyLen   = 20 // magic 8, option 4, type 4, length 4
	maxString     = 4096
	maxPayload    = 32 << 20 // proto, "Size constraints": what every peer must take
	maxStatus     = 1 << 20  // descriptors in one block status chunk (proto, NBD_REPLY_TYPE_BLOCK_STATUS)
	maxOptionData = 64 << 10 // longest option data looked at; a name is at most 4096
	maxSkip       = 1 << 20  // longest option data read over rather than hung up on
)

var be = binary.BigEndian

// request is one request header (proto, "Request message").
type request struct {
	flags, cmd uint16
	cookie     uint64
	off        uint64
	n          uint32 // bytes
}

func (r request) put(p []byte) {
	be.PutUint32(p, magicRequest)
	be.PutUint16(p[4:], r.flags)
	be.PutUint16(p[6:], r.cmd)
	be.PutUint64(p[8:], r.cookie)
	be.PutUint64(p[16:], r.off)
	be.PutUint32(p[24:], r.n)
}

// parseRequest reads requestLen bytes; false when the magic is wrong.
func parseRequest(p []byte) (request, bool) {
	return request{
		flags:  be.Uint16(p[4:]),
		cmd:    be.Uint16(p[6:]),
		cookie: be.Uint64(p[8:]),
		off:    be.Uint64(p[16:]),
		n:      be.Uint32(p[24:]),
	}, be.Uint32(p) == magicRequest
}

func putSimple(p []byte, e Errno, cookie uint64) {
	be.PutUint32(p, magicSimple)
	be.PutUint32(p[4:], uint32(e))
	be.PutUint64(p[8:], cookie)
}

func putChunk(p []byte, flags, typ uint16, cookie uint64, n int) {
	be.PutUint32(p, magicStructured)
	be.PutUint16(p[4:], flags)
	be.PutUint16(p[6:], typ)
	be.PutUint64(p[8:], cookie)
	be.PutUint32(p[16:], uint32(n))
}
