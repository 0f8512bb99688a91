package checker

import (
	"context"
	"fmt"
	"strings"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// Allowed is what the faults of a run excuse.
type Allowed struct {
	WireDuplicates int64 // messages more on the wire than were written
	LostAsync      bool  // a server crashed: commits that did not wait for the disk may be gone
	Unordered      bool  // effects of one key, since several consumers were active
}

// Violation is an invariant that does not hold.
type Violation struct {
	Invariant string // as in I1 to I13 of docs/reliability.md
	What      string
	Count     int64
	Lives     []string // of the first messages that break it
}

// invariant is a query for the messages that break it.
type invariant struct{ name, what, sql string }

// indexes make the queries of Check and of lives quick.
const indexes = `
CREATE INDEX ON committed (message_id);
CREATE INDEX ON wire (message_id);
CREATE INDEX ON applied (message_id);
CREATE INDEX ON parked (message_id);
CREATE INDEX ON outcomes (message_id);
ANALYZE committed, wire, applied, parked, outcomes;
CREATE TABLE first_seen AS SELECT DISTINCT ON (message_id) message_id, pos, key, seq FROM wire ORDER BY message_id, pos;
`

var invariants = []invariant{
	{"I1", "committed, and neither applied nor parked as poison", `
SELECT message_id FROM committed c, consumers s
WHERE NOT EXISTS (SELECT FROM applied a WHERE a.message_id = c.message_id AND a.consumer = s.consumer)
  AND NOT (expected = 'parked' AND EXISTS (SELECT FROM parked p WHERE p.message_id = c.message_id AND p.consumer IN ('', s.consumer)))`},
	{"I1", "applied, though it was to be parked as poison", `
SELECT message_id FROM committed c JOIN applied USING (message_id) WHERE expected = 'parked'`},
	{"I2", "on the wire, and not committed", `
SELECT DISTINCT message_id FROM wire w WHERE NOT EXISTS (SELECT FROM committed c WHERE c.message_id = w.message_id)`},
	{"I2", "applied, and not committed", `
SELECT DISTINCT message_id FROM applied a WHERE NOT EXISTS (SELECT FROM committed c WHERE c.message_id = a.message_id)`},
	{"I2", "parked, and not committed", `
SELECT DISTINCT message_id FROM parked p WHERE NOT EXISTS (SELECT FROM committed c WHERE c.message_id = p.message_id)`},
	{"I3", "applied more than once", `
SELECT message_id FROM applied GROUP BY message_id, consumer HAVING count(*) > 1`},
	{"I3", "applied, and parked as well", `
SELECT DISTINCT a.message_id FROM applied a JOIN parked p ON p.message_id = a.message_id AND p.consumer IN ('', a.consumer)`},
	{"I4", "first on the wire after a later one of its key", `
SELECT message_id FROM (SELECT message_id, seq, max(seq) OVER (PARTITION BY key ORDER BY pos ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS later
                        FROM first_seen WHERE key IS NOT NULL) w
WHERE later > seq`},
	{"I4", "applied after a later one of its key", `
SELECT message_id FROM (SELECT message_id, seq, max(seq) OVER (PARTITION BY consumer, key ORDER BY pos ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS later
                        FROM applied WHERE key IS NOT NULL) a
WHERE later > seq`},
	{"I5", "changed on the wire", `
SELECT DISTINCT message_id FROM wire w JOIN committed c USING (message_id)
WHERE (w.key, w.seq, w.hash) IS DISTINCT FROM (c.key, c.seq, c.hash)`},
	{"I5", "changed when it was applied", `
SELECT DISTINCT message_id FROM applied a JOIN committed c USING (message_id)
WHERE (a.key, a.seq, a.hash) IS DISTINCT FROM (c.key, c.seq, c.hash)`},
	{"I9", "committed, and its client was told that it failed", `
SELECT message_id FROM outcomes o JOIN committed USING (message_id) WHERE outcome = 'failed'`},
	{"I9", "not committed, and its client was told that it was", `
SELECT message_id FROM outcomes o WHERE outcome = 'ok' AND NOT EXISTS (SELECT FROM committed c WHERE c.message_id = o.message_id)`},
	{"I9", "not committed without a crash, and its client was told that it was", `
SELECT message_id FROM outcomes o WHERE outcome = 'async' AND NOT EXISTS (SELECT FROM committed c WHERE c.message_id = o.message_id)`},
}

// Check asks for all invariants that rows can tell of.
func (c *Checker) Check(ctx context.Context, allowed Allowed) ([]Violation, error) {
	if _, err := c.conn.Exec(ctx, indexes); err != nil {
		return nil, fmt.Errorf("index what is known: %w", err)
	}
	var all []Violation
	for _, i := range invariants {
		if allowed.LostAsync && strings.Contains(i.what, "without a crash") || allowed.Unordered && strings.Contains(i.what, "applied after") {
			continue
		}
		v, err := c.check(ctx, i)
		if err != nil {
			return nil, fmt.Errorf("%s, %s: %w", i.name, i.what, err)
		}
		if v.Count > 0 {
			all = append(all, v)
		}
	}
	duplicates, err := c.WireDuplicates(ctx)
	if err != nil {
		return nil, err
	}
	if duplicates > allowed.WireDuplicates {
		all = append(all, Violation{Invariant: "I6", What: fmt.Sprintf("more than %d duplicates on the wire", allowed.WireDuplicates), Count: duplicates})
	}
	return all, nil
}

// maxLives is of how many messages a violation tells.
const maxLives = 5

func (c *Checker) check(ctx context.Context, i invariant) (Violation, error) {
	v := Violation{Invariant: i.name, What: i.what}
	rows, err := c.conn.Query(ctx, fmt.Sprintf("SELECT message_id, count(*) OVER () FROM (%s) b ORDER BY message_id LIMIT %d", i.sql, maxLives))
	if err != nil {
		return v, err
	}
	var ids []uuid.UUID
	var id uuid.UUID
	_, err = pgx.ForEachRow(rows, []any{&id, &v.Count}, func() error { ids = append(ids, id); return nil })
	if err != nil {
		return v, err
	}
	for _, id := range ids {
		life, err := c.life(ctx, id)
		if err != nil {
			return v, err
		}
		v.Lives = append(v.Lives, life)
	}
	return v, nil
}

// lifeSQL tells all that is known of a message.
const lifeSQL = `
SELECT string_agg(event, '; ' ORDER BY n, pos) FROM (
          SELECT 1 AS n, 0::bigint AS pos, format('committed key %s seq %s hash %s expected %s', coalesce(key, '-'), seq, hash, expected) AS event FROM committed WHERE message_id = $1
UNION ALL SELECT 2, 0, 'client told ' || outcome FROM outcomes WHERE message_id = $1
UNION ALL SELECT 3, pos, format('wire %s key %s seq %s hash %s', pos, coalesce(key, '-'), seq, hash) || CASE WHEN redelivered THEN ' redelivered' ELSE '' END FROM wire WHERE message_id = $1
UNION ALL SELECT 4, pos, format('applied %s by %s seq %s hash %s', pos, consumer, seq, hash) FROM applied WHERE message_id = $1
UNION ALL SELECT 5, 0, format('parked as %s by %s', reason, coalesce(nullif(consumer, ''), 'the relay')) FROM parked WHERE message_id = $1) l`

func (c *Checker) life(ctx context.Context, id uuid.UUID) (string, error) {
	var life string
	err := c.conn.QueryRow(ctx, lifeSQL, id).Scan(&life)
	return id.String() + ": " + life, err
}

// WireDuplicates counts how often a message was on the wire that had been there before. One
// that was redelivered to who watches is no duplicate.
func (c *Checker) WireDuplicates(ctx context.Context) (n int64, err error) {
	err = c.conn.QueryRow(ctx, `
SELECT coalesce(sum(n - 1), 0) FROM (SELECT count(*) FILTER (WHERE NOT redelivered) AS n FROM wire GROUP BY message_id) w WHERE n > 1`).Scan(&n)
	if err != nil {
		return 0, fmt.Errorf("count duplicates on the wire: %w", err)
	}
	return n, nil
}

// Messages returns how many were committed.
func (c *Checker) Messages(ctx context.Context) (n int64, err error) {
	err = c.conn.QueryRow(ctx, "SELECT count(*) FROM committed").Scan(&n)
	return n, err
}
