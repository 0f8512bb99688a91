package main

// saboteur is a mistake that a relay or an inbox can make, as edits of our source.
type saboteur struct {
	name   string
	edits  []edit
	faults string // that bring it to light
	hold   string // how long they hold at most; "": as usual
}

// edit replaces what stands in a file exactly once.
type edit struct{ file, old, new string }

var saboteurs = []saboteur{
	{"marks as sent before the confirm", []edit{
		{"relay/answer.go", "if !isClosed(f.confirm.Done()) {", "if false {"},
		{"relay/answer.go", "if !f.confirm.Acked() && (c.ch.IsClosed() || c.conn.IsClosed()) {", "if false {"},
		{"relay/answer.go", "\t\tif f.confirm.Acked() {", "\t\tif true {"},
	}, "net-cut,net-vanish,broker-kill", ""},
	{"takes a closed channel's false for sent", []edit{
		{"relay/answer.go", "c.undecided = append(c.undecided, f.message)", "acked = append(acked, f.message)"},
	}, "net-cut,broker-kill,cut-at-confirm", ""},
	{"ignores returns", []edit{
		{"relay/answer.go", "if len(c.returned) > 0 {", "if false {"},
	}, "binding-removed", ""},
	{"reads returns slowly from a channel with one place", []edit{
		{"relay/channel.go", "make(chan amqp.Return, window+1)", "make(chan amqp.Return, 1)"},
		{"relay/answer.go", "for len(c.returns) > 0 {", "for len(c.returns) > 0 && since()/1e9%16 == 0 {"},
	}, "binding-removed", "20s"},
	{"reads what is above a cursor alone", []edit{
		{"relay/gaps.go", "if len(spans) > 0 {", "if false {"},
		{"relay/reader.go", "if !r.scan.urgent && !r.scan.pace.due() {", "if !r.scan.urgent {"},
	}, "producer-stop", ""},
	{"gives a message a new ID when it is sent again", []edit{
		{"relay/message.go", "m.messageID.String(),", "m.wireID(),"},
		{"relay/message.go", "func (m *message) check() error {", `func (m *message) wireID() string {
	if m.sentAt != 0 {
		return uuid.NewString()
	}
	return m.messageID.String()
}

func (m *message) check() error {`},
	}, "net-cut,broker-close", ""},
	{"parks without looking at the epoch", []edit{
		{"relay/sql.go", "WHERE l.owner = $1 AND (l.lane, l.epoch) IN (SELECT * FROM unnest($2::smallint[], $3::bigint[]))",
			"WHERE l.lane = ANY ($2::smallint[]) AND ($1::uuid IS NOT NULL OR $3::bigint[] IS NOT NULL)"},
	}, "relay-stop,binding-removed,exchange-removed", "10s"},
	{"does not hold followers behind a parked head", []edit{
		{"relay/settled.go", "l.blocked, l.busy, l.headParked = true, false, true", "l.blocked, l.busy, l.headParked = false, false, false"},
		{"relay/hand.go", "l.blocked = l.blocked || m.behind", "l.blocked = false"},
	}, "binding-removed,exchange-removed", ""},
	{"publishes before the log is flushed", []edit{
		{"relay/page.go", "flushed := p.durable || len(p.ids) == 0", "flushed := true"},
	}, "postgres-kill", ""},
	{"acknowledges before COMMIT", []edit{
		{"inbox/receive.go", "queue := c.queues[c.cfg.Workers]\n", "d.acks.settled([]uint64{d.DeliveryTag})\n\tqueue := c.queues[c.cfg.Workers]\n"},
		{"inbox/acks.go", "func acknowledge(items ...*item) {", "func acknowledge(items ...*item) {\n\titems = nil"},
	}, "consumer-kill", ""},
	{"consumes with automatic acknowledgement", []edit{
		{"inbox/receive.go", "ch.Consume(c.queue, c.cfg.Name, false,", "ch.Consume(c.queue, c.cfg.Name, true,"},
		{"inbox/acks.go", "func acknowledge(items ...*item) {", "func acknowledge(items ...*item) {\n\titems = nil"},
	}, "consumer-kill", ""},
	{"records in a transaction of its own", []edit{
		{"inbox/tx.go", "\treturn t, nil\n}", "\t_, err = conn.Exec(ctx, \"COMMIT\")\n\tif err == nil {\n\t\t_, err = conn.Exec(ctx, \"BEGIN\")\n\t}\n\treturn t, err\n}"},
	}, "consumer-kill,net-cut,commit-lost", ""},
	{"keys the inbox without the consumer", []edit{
		{"inbox/consumer.go", "cfg.Name = queue\n", "cfg.Name = \"everyone\"\n"},
	}, "net-cut", ""},
	{"forgets after a second", []edit{
		{"inbox/retention.go", "olderThan: c.cfg.Horizon + pruneAfter", "olderThan: time.Second"},
		{"inbox/retention.go", "sleep(ctx, rand.N(pruneEvery))", "sleep(ctx, rand.N(300*time.Millisecond))"},
	}, "net-vanish,commit-answer-lost,relay-kill,postgres-kill", ""},
	{"trusts the order of RETURNING", []edit{
		{"inbox/apply.go", "\t\tvar txid int64\n", "\t\tvar txid int64\n\t\tn := -1\n"},
		{"inbox/apply.go", "byID[id].fate = handled", "n++\n\t\t\tu.items[n].fate = handled"},
	}, "net-cut,consumer-kill,relay-kill", ""},
	{"handles what stands behind a parked message", []edit{
		{"inbox/apply.go", "m.fate = blocked\n", "m.fate = handled\n"},
	}, "net-cut", ""},
	{"takes the COMMIT of a failed transaction for one", []edit{
		{"inbox/guard.go", "case err == nil && conn.TxStatus() == 'E':", "case false:"},
		{"inbox/tx.go", "if err == nil || refused(err) {", "if errors.Is(err, pgx.ErrTxCommitRollback) {\n\t\treturn nil\n\t}\n\tif err == nil || refused(err) {"},
		{"inbox/pipeline.go", "if err == nil && tag.String() == \"ROLLBACK\" {", "if false {"},
	}, "net-cut", ""},
}
